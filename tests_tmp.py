import time,json,sys
from reward import *
if __name__=="__main__":
    rows=[json.loads(l) for l in open('/work/shared/data/answers.jsonl')]
    v=Verifier(2); t=time.time(); v.score(["\\boxed{\\frac{1}{2}}"]*2,["0.5"]*2); print('start',time.time()-t)
    t=time.time(); s=v.score([r["response"] for r in rows],[r["gold"] for r in rows]); print('pairs/s',len(rows)/(time.time()-t), v.timeouts, v.crashes)
    for r,x in zip(rows,s):
        if x!=r["reward"]: print(r,x)
    wrong=[r for r in rows if not r["reward"] and equal_at_once(extract_answer(r["response"]) or "",r["gold"]) is None and extract_answer(r["response"])]
    t=time.time(); v.score([r["response"] for r in wrong],[r["gold"] for r in wrong]); print(len(wrong),'wrong/s',len(wrong)/(time.time()-t))
    t=time.time(); v.score([r["response"] for r in rows],[r["gold"] for r in rows]); print('again pairs/s',len(rows)/(time.time()-t), v.timeouts, v.crashes)
    v.close()
